"""`python launch/evaluate.py --help`; phi3v_dist/cli/evaluate.py does the work."""

from phi3v_dist.cli.evaluate import main

if __name__ == "__main__":
    main()

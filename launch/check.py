"""`python launch/check.py --help`; phi3v_dist/cli/check.py does the work."""

from phi3v_dist.cli.check import main

if __name__ == "__main__":
    main()

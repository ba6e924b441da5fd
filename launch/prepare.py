"""`python launch/prepare.py --help`; phi3v_dist/cli/prepare.py does the work."""

from phi3v_dist.cli.prepare import main

if __name__ == "__main__":
    main()

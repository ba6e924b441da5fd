"""`python launch/init.py --help`; phi3v_dist/cli/init.py does the work."""

from phi3v_dist.cli.init import main

if __name__ == "__main__":
    main()

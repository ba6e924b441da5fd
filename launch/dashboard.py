"""`python launch/dashboard.py --help`; phi3v_dist/cli/dashboard.py does the work."""

from phi3v_dist.cli.dashboard import main

if __name__ == "__main__":
    main()

"""`python launch/diagnose.py --help`; phi3v_dist/cli/diagnose.py does the work."""

from phi3v_dist.cli.diagnose import main

if __name__ == "__main__":
    main()

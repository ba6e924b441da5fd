"""`python launch/report.py --help`; phi3v_dist/cli/report.py does the work."""

from phi3v_dist.cli.report import main

if __name__ == "__main__":
    main()

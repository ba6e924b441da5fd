"""`python launch/export.py --help`; phi3v_dist/cli/export.py does the work."""

from phi3v_dist.cli.export import main

if __name__ == "__main__":
    main()

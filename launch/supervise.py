"""`python launch/supervise.py --help`; phi3v_dist/cli/supervise.py does the work."""

from phi3v_dist.cli.supervise import main

if __name__ == "__main__":
    main()

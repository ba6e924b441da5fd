"""`python launch/job.py --help`; phi3v_dist/cli/job.py does the work."""

from phi3v_dist.cli.job import main

if __name__ == "__main__":
    main()

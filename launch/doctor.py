"""`python launch/doctor.py --help`; phi3v_dist/cli/doctor.py does the work."""

from phi3v_dist.cli.doctor import main

if __name__ == "__main__":
    main()

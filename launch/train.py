"""`python launch/train.py --help`; phi3v_dist/cli/train.py does the work."""

from phi3v_dist.cli.train import main

if __name__ == "__main__":
    main()

"""The commands: argument parsing and printing. `launch/` and the installed `phi3v-…` commands call these modules.

Note: this package imports nothing, because training catches signals before the imports that take seconds.
"""

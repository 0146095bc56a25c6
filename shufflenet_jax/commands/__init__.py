"""The commands: each parses its arguments and calls the library. The scripts at the top level run them."""

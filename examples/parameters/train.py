"""Prints its arguments: every kind of parameter as argparse reads it."""

import argparse

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int)
parser.add_argument("--model", choices=["tree", "linear", "boosted"])
parser.add_argument("--shuffle", type=lambda text: text == "True")
parser.add_argument("--layers", type=lambda text: [int(each) for each in text.split(",")])
parser.add_argument("--rate", type=float)
parser.add_argument("--column", action="append", default=[])
parser.add_argument("--tags", nargs="+", default=[])
parser.add_argument("--verbose", action="store_true")

for name, value in vars(parser.parse_args()).items():
    print(f"{name} = {value!r}", flush=True)

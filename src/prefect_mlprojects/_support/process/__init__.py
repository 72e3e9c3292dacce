"""Child processes: run, guard and end them."""

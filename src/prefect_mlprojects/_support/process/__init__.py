"""Child processes: start them, stream their output, and end their whole process trees."""

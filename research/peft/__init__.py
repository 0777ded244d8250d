"""PEFT methods as transforms of a parameter tree: one file a method, found by its name."""

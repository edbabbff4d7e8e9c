"""What may happen to a file: one bit of it, its end, all of it."""

import os


def flip(file):
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def delete(file):
    file.unlink()


DAMAGES = (flip, halve, empty, zero, delete)

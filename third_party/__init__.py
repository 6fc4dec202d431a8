"""What the ``ck`` back end is compiled against: where it comes from, how it is found and how it is verified."""

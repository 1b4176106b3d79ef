"""The checks of `unstract-wire doctor` over PostgreSQL."""

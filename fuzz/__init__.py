"""Fuzz targets of the wire's readers; `make fuzz` runs them (see __main__.py), and needs atheris."""

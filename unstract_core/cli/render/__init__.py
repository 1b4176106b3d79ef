"""The output of the commands: tables, the live view, log lines and masked passwords."""

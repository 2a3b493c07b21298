"""What ends a run that should not go on, or has it leave in time. Free of torch at import, for the launcher."""

"""Scripted experts in real simulators, written in LIBERO's HDF5 layout."""

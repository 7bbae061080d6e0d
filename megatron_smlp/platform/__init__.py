"""The device of a process, and what torch and Megatron need on a machine without a GPU."""

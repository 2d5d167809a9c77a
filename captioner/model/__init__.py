"""The network, its shape, and the file that holds a trained one."""

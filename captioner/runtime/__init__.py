"""The machine: files, signals, device, number formats, memory, processes."""

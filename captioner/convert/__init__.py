"""Files other programs wrote: Torch7, Caffe, torchvision; and export of our own."""

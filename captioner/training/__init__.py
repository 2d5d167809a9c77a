"""What a training run consists of; its loop stands in captioner/cli/train.py."""

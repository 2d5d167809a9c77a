"""Captions of videos and cameras: scenes, subtitles, annotated files, a window. Needs the extra `video`."""

"""caption-download: pictures by lists of addresses."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from captioner.cli.options import Parser, Range, flag, non_negative, positive, run


def build_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="caption-download",
        description="Download lists of pictures, many at a time; the same command goes on where it was stopped. "
        "A line is URL, or URL<tab>path, or URL<tab>path<tab>checksum (sha256:.. or md5:..).",
    )
    p.add_argument("list", nargs="+", help="text files; of several, each fills a folder that is named as the list")
    p.add_argument("--folder", default="images", help="where the files go")
    p.add_argument("--limit", type=positive, metavar="N", help="files wanted in each folder (default: all)")
    p.add_argument("--only", nargs="+", default=[], metavar="FOLDER", help="fetch the files of these folders only")
    p.add_argument("--numbered", default=False, type=flag, help="name files 000001.jpg, .., not by their addresses")
    p.add_argument("--connections", default=16, type=Range(int, 1, 1000), help="downloads at a time")
    p.add_argument("--retries", default=5, type=non_negative, help="further attempts per file")
    p.add_argument("--timeout", default=30, type=positive, help="seconds of silence to wait")
    p.add_argument("--max_mb", default=512, type=positive, help="largest file, in MiB")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    opt = build_parser().parse_args(argv)
    return run("caption-download", lambda: _download(opt))


def _download(opt: argparse.Namespace) -> None:
    from captioner.data.download import Limits, download_lists

    there = download_lists(
        [Path(name) for name in opt.list],
        Path(opt.folder),
        connections=opt.connections,
        limits=Limits(retries=opt.retries, timeout=opt.timeout, max_bytes=opt.max_mb * 2**20),
        per_folder=opt.limit,
        only=opt.only,
        numbered=opt.numbered,
    )
    print(f"all {there:,} files are in {opt.folder}")


if __name__ == "__main__":
    raise SystemExit(main())

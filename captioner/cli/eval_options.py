"""Which options of caption-eval go together, and what several of them mean at once."""

import argparse
import os

from captioner.errors import InputError


def take_pictures_from_models(opt: argparse.Namespace) -> None:
    """--model takes all that follows it; what can only be pictures is meant as such."""
    from captioner.data.image_formats import has_image_suffix
    from captioner.data.listing import is_address

    def is_picture(name: str) -> bool:
        return name == "-" or is_address(name) or os.path.isdir(name) or has_image_suffix(name)

    opt.pictures = [name for name in opt.model if is_picture(name)] + opt.pictures
    opt.model = [name for name in opt.model if not is_picture(name)]
    if opt.watch and len(opt.pictures) == 1:
        opt.image_folder = opt.pictures.pop()


def check_options(opt: argparse.Namespace) -> None:
    """Refuse contradictions before anything is read.

    Raises:
        InputError: two options exclude each other.
    """
    if opt.pictures and (opt.image_folder or opt.input_h5 or opt.input_json):
        raise InputError(
            f"{opt.pictures[0]} is named besides --image_folder or a dataset", expected="one source of pictures"
        )
    if "-" in opt.pictures and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("-: several processes cannot all read stdin", remedy="name a folder or a pattern")
    if opt.image_folder and (opt.input_h5 or opt.input_json):
        raise InputError("--image_folder and --input_h5/--input_json exclude each other", expected="one of them")
    if bool(opt.input_h5) != bool(opt.input_json):
        raise InputError("--input_h5 and --input_json belong together", expected="both, or neither")
    if opt.coco_json and not opt.image_folder:
        raise InputError("--coco_json lists files by name only", remedy="say where they are with --image_folder")
    from captioner.data.listing import is_address, is_shard

    for name, wanted in (("--write_txt", opt.write_txt), ("--write_metadata", opt.write_metadata)):
        if wanted and not (opt.pictures or opt.image_folder):
            raise InputError(f"{name} writes beside photos", remedy="name photos or their folder")
        if wanted and any(map(is_address, opt.pictures)):
            raise InputError(f"{name} writes beside photos, and addresses have no such place", remedy="use --output")
        if wanted and any(map(is_shard, opt.pictures)):
            raise InputError(f"{name} writes beside photos, not into archives", remedy="use --output")
    if opt.only_missing and not (opt.write_txt or opt.write_metadata):
        raise InputError(
            "--only_missing is about text files or metadata of photos", remedy="add --write_txt or --write_metadata"
        )
    if not opt.write_txt:
        for name, given in (
            ("prefix", opt.prefix),
            ("suffix", opt.suffix),
            ("existing", opt.existing != "keep"),
            ("txt_extension", opt.txt_extension != ".txt"),
        ):
            if given:
                raise InputError(f"--{name} is about the text files of --write_txt", remedy="add --write_txt")
    if opt.existing != "keep" and opt.overwrite:
        raise InputError(f"--existing {opt.existing} and --overwrite exclude each other", expected="one of them")
    if opt.language_eval and (opt.pictures or opt.image_folder) and not opt.references:
        raise InputError("--language_eval needs known captions", remedy="name a file of them with --references")
    if opt.references and not opt.language_eval:
        raise InputError("--references are for scoring", remedy="add --language_eval 1")
    if opt.share and not (dumps_page(opt) and opt.dump_images):
        raise InputError(
            "--share is made from the page and its pictures", remedy="leave out --dump_images 0 and the like"
        )
    if opt.watch and not opt.image_folder:
        raise InputError("--watch 1 watches a folder", remedy="name it with --image_folder")
    if opt.watch and (opt.coco_json or opt.num_images is not None or opt.language_eval or opt.share):
        raise InputError("--watch 1 excludes --coco_json, --num_images, --language_eval and --share")
    if opt.watch and (opt.output == "-" or opt.only_missing):
        raise InputError("--watch 1 excludes --output - and --only_missing")
    if opt.watch and not (opt.output or dumps_page(opt)):
        raise InputError("--watch 1 has nowhere to keep its captions", remedy="give --output or --vis_dir")
    if opt.resume and opt.output == "-":
        raise InputError("--resume cannot go on with what stdout has got", remedy="keep results with --output FILE")
    if opt.resume and not (opt.output or dumps_page(opt)):
        raise InputError("--resume has nothing to go on from", remedy="keep results with --output or --vis_dir")


def dumps_page(opt: argparse.Namespace) -> bool:
    """Whether the page is wanted."""
    return bool(opt.vis_dir) and opt.dump_json

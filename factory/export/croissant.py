"""croissant.json: the dataset described in Croissant 1.0 (JSON-LD), as `mlcroissant validate` takes it.

Source: MLCommons Croissant Format Specification 1.0, http://mlcommons.org/croissant/1.0. One record set, `samples`,
reads samples.csv; the files of the format itself are a file set.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from factory.export.manifest import COLUMNS, SAMPLES

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_FILES = {
    "folder": ("image/png", "*/images/*/*.png"),
    "nnunet": ("image/png", "imagesTr/*.png"),
    "huggingface": ("application/vnd.apache.arrow.file", "*/*.arrow"),
    "webdataset": ("application/x-tar", "*.tar"),
    "coco": ("image/png", "*/*.png"),
}
"""Format → media type and glob of the files with the images."""
_ABOUT = {
    "id": "image_id of a real row, request_id of a synthetic one",
    "split": "train or val",
    "origin": "real, synthetic, or derived: synthetic with pixels of a real image",
    "label": "index into the class names",
    "label_name": "class name",
    "image": "file with the image",
    "image_member": "its name or row number inside that file; empty where the file is the image",
    "image_sha256": "SHA-256 of the image as PNG",
    "mask": "file with the label map; empty where there is none",
    "mask_member": "its name or row number inside that file",
    "mask_sha256": "SHA-256 of the label map as PNG",
    "dataset": "of a real row",
    "recipe": "of a synthetic row",
    "plan_id": "of a synthetic row",
    "licence": "of a real row; inherited from the real rows by a synthetic one",
    "group": "pseudonym of the patient or near-duplicate group; rows of one group belong in one fold",
}


def croissant(
    *,
    name: str,
    description: str,
    format: str,
    licences: Sequence[str],
    citations: Sequence[str],
    limitations: str,
    date: str,
    samples_sha256: str,
    samples_bytes: int,
) -> Mapping[str, Any]:
    """The JSON-LD of one export, as plain data; `date` is ISO 8601, sizes are in bytes."""
    media, glob = _FILES[format]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": description,
        "version": "1.0.0",
        "license": list(licences),
        "citeAs": "; ".join(citations),
        "url": "./",
        "datePublished": date,
        "rai:dataLimitations": limitations,
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": SAMPLES,
                "name": SAMPLES,
                "description": "One line per image.",
                "contentUrl": SAMPLES,
                "contentSize": f"{samples_bytes} B",
                "encodingFormat": "text/csv",
                "sha256": samples_sha256,
            },
            {
                "@type": "cr:FileSet",
                "@id": "image-files",
                "name": "image-files",
                "description": f"The files of format {format}; manifest.json has their checksums.",
                "encodingFormat": media,
                "includes": glob,
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "samples",
                "name": "samples",
                "key": {"@id": "samples/id"},
                "field": [_field(column) for column in COLUMNS],
            }
        ],
    }


def _field(column: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"samples/{column}",
        "name": column,
        "description": _ABOUT[column],
        "dataType": "sc:Integer" if column == "label" else "sc:Text",
        "source": {"fileObject": {"@id": SAMPLES}, "extract": {"column": column}},
    }

"""Prediction of data of any size: sources in shards, read ahead by threads, to parquet files that survive any kill."""

from stfbnn.bulk.counted_sources import DatasetSource, HuggingFaceSource, IterableSource
from stfbnn.bulk.parquet_source import ParquetSource
from stfbnn.bulk.predicting import predict_shards
from stfbnn.bulk.reading import UnreadableShardError
from stfbnn.bulk.result import PredictedShards, Skipped
from stfbnn.bulk.source import Normalise, Rows, Source
from stfbnn.bulk.tar_source import TarSource

__all__ = [
    "DatasetSource",
    "HuggingFaceSource",
    "IterableSource",
    "Normalise",
    "ParquetSource",
    "PredictedShards",
    "Rows",
    "Skipped",
    "Source",
    "TarSource",
    "UnreadableShardError",
    "predict_shards",
]

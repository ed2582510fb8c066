"""Keep files of runs and datasets on disks and in buckets: paths, locks, JSON, atomic writes."""

"""Reports of runs: self-contained pages and lists, rebuilt from run folders alone.

- ``files``: bounded, tolerant reading of the files of a run folder
- ``series``: metrics of a run as curves, downsampled with their extremes
- ``story``: everything that a page shows about a run, as plain data
- ``page``: the HTML page of one run or of several
- ``position``: state, stage and counters of a run
- ``live``: a run that is followed while its files change
- ``listing``: the runs below a folder
- ``fields``, ``query``: values of runs by name; conditions, columns, files and data frames
- ``builds``: data of pages, made by other processes when a run changed
- ``server``: server of the pages of a folder; imports starlette

No module imports torch. Files of a run may be cut, damaged or hostile: a problem is listed in the
result and never raised.
"""

"""Static pages that a person can judge by: no server, no network.

    sample + answer + clip -> examples.py -> views.py -> page.py (templates/) -> index.html and media/
    sweep.json -> sweep.py, sweep_*.py -> sweep_views.py -> page.py (templates/) -> index.html

Pure rendering. Who calls brings the rows of a run (`jobs/report.py`), the answers about loose clips (`jobs/predict.py`)
or the record of a sweep (`jobs/sweep_report.py`). Everything that a model, a data set or a job wrote goes through
jinja2 with autoescape, files are named by their own digest, and the pages' Content-Security-Policy forbids everything
that does not lie beside them, and scripts: all on the page of answers, all but our own on that of a sweep.
"""

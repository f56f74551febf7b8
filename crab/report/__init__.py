"""A static page of scores and examples that a person can judge: no server, no network, no script.

    sample + answer + clip -> examples.py -> views.py -> page.py (templates/) -> index.html and media/

Pure rendering. Who calls brings the rows of a run (`jobs/report.py`) or the answers about loose clips
(`jobs/predict.py`). Everything that a model or a data set wrote goes through jinja2 with autoescape, files are named by
their own digest, and the page's Content-Security-Policy forbids scripts and everything that does not lie beside it.
"""

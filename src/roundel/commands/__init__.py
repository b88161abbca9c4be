"""The commands: what each computes, and in `app.py` and `line/` how it is typed."""

"""The paper's questions on a real model: a table of runs, a runner, and the page that their results make."""

"""`python -m graftwork.cluster.driver ROOT JOB_ID ATTEMPT ON`: run one attempt of a job where the work is."""

import sys

from graftwork.cluster.driver.guard import run_supervised
from graftwork.cluster.driver.run import drive

if __name__ == "__main__":
    root, job_id, number, on = sys.argv[1:]
    sys.exit(run_supervised(lambda: drive(root, job_id, int(number), on)))

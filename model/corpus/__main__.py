"""A worker process of data processing; see `model.corpus.worker`."""

from model.corpus.worker import main

if __name__ == "__main__":
    main()

from tooling.cli.app import main

# Benches start processes that import whatever started them.
if __name__ == "__main__":
    main()

from tooling.cli.app import main

# The benches start processes, and each such process imports this module again.
if __name__ == "__main__":
    main()

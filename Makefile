# One command does each thing; `make help` lists them. All need Rust and a C compiler (the linker).

CARGO ?= cargo
# Each whole-system test starts virtual machines of its own: more at once than cores only disturbs them.
TEST_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
# How long to torture or to fuzz, and what.
T ?= 1m
TARGET ?= kernels

.DEFAULT_GOAL := help
.PHONY: help build static demo bench bench-smoke torture fuzz test api-check conformance lint coverage miri fmt \
	linux-guest linux-guest-if-possible linux-figures clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build salp, optimised: target/release/salp
	$(CARGO) build --release --package salp

# The C library is linked in too: the binary needs nothing but a kernel. --target, so that the flag is not
# meant for build scripts and macros, which are loaded by the compiler.
STATIC_TARGET := x86_64-unknown-linux-gnu
static: ## Build salp without shared libraries: target/x86_64-unknown-linux-gnu/release/salp
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --release --package salp --target $(STATIC_TARGET)

demo: build ## Fork a running microVM and show what it cost
	target/release/salp demo

# Other sizes and runs: `target/release/salp bench --help`.
bench: build ## Measure what a clone costs, against other ways to a second VM: target/bench.html
	target/release/salp bench all --memory 128M,512M,1G,8G --runs 10 --burst 100,1000 \
		--json target/bench.json --csv target/bench.csv --report target/bench.html

bench-smoke: ## Check that the benchmark works: records come out and parse
	$(CARGO) build --package salp
	$(CARGO) test --package salp-tests --test bench_smoke -- --show-output

torture: build ## Torture VMs at random and under memory pressure for T=1m
	target/release/salp torture --time $(T)

# `-s none -D` and the like in FUZZ go to cargo-fuzz. What is found is kept in tests/fuzz/artifacts, and the
# corpus of all inputs, the committed ones included, in target/fuzz.
# `requests` starts colonies of the debug binary, with names and sockets in a directory of its own, which
# goes afterwards; their threads allocate at all times, so that a look for leaks after an input finds nothing.
fuzz: ## Fuzz TARGET=kernels|rings|accesses|requests for T=1m (needs cargo-fuzz and a nightly toolchain)
	$(CARGO) build --workspace
	mkdir -p target/fuzz/corpus/$(TARGET)
	TMPDIR=$$(mktemp -d) && export TMPDIR && trap 'rm -rf "$$TMPDIR"' EXIT && \
	SALP_BINARY=$(CURDIR)/target/debug/salp \
	$(CARGO) +nightly fuzz run --fuzz-dir tests/fuzz --target-dir target/fuzz $(FUZZ) $(TARGET) \
		target/fuzz/corpus/$(TARGET) tests/fuzz/corpus/$(TARGET) -- $(if $(filter requests,$(TARGET)),-detect_leaks=0) \
		-max_total_time=$$(( $$(echo $(T) | sed 's/h$$/*3600/; s/m$$/*60/; s/s$$//') )) -timeout=60 -rss_limit_mb=4096

# --show-output: a test that the host cannot run says SKIPPED and why, also where it passes.
# The whole-system tests start the binary `salp` of the same profile: it is built first.
test: lint linux-guest-if-possible ## Check and test everything; what the host cannot do is reported as SKIPPED
	$(CARGO) build --workspace
	$(CARGO) test --workspace --no-fail-fast -- --test-threads=$(TEST_THREADS) --show-output

# Schemathesis comes from PyPI, into target/api-check. More requests: `make api-check EXAMPLES=500`.
EXAMPLES ?= 50
api-check: ## Have schemathesis make requests from the API's document
	$(CARGO) build --package salp
	python3 resources/api/check.py target/debug/salp target/api-check $(EXAMPLES)

# The files with tests that are named after rows of the table; others may be added.
CONFORMANCE_FILES ?= $(wildcard $(addprefix tests/tests/,rows_*.rs reset.rs failures.rs))

conformance: ## Run the conformance table at all its points, and write tests/CONFORMANCE.md
	$(CARGO) build --workspace
	@mkdir -p target
	@SALP_CONFORMANCE=all $(CARGO) test --package salp-tests --no-fail-fast $(patsubst tests/tests/%.rs,--test %,$(CONFORMANCE_FILES)) -- \
		--test-threads=$(TEST_THREADS) --show-output >target/conformance.txt 2>&1 || \
		{ grep -E '^test .*FAILED|panicked at' -A 1 target/conformance.txt; \
		echo "a row fails: target/conformance.txt has it all"; exit 1; }
	target/debug/conformance_table target/conformance.txt tests/CONFORMANCE.md

lint: ## Check formatting and clippy's rules
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path guest/Cargo.toml --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	cd guest && $(CARGO) clippy -- -D warnings

coverage: ## Line coverage of the memory core by its own tests, above 90 %
	CARGO="$(CARGO)" resources/coverage.sh

miri: ## Run the memory core's tests under Miri, where it is installed
	CARGO="$(CARGO)" resources/miri.sh

fmt: ## Format all code
	$(CARGO) fmt --all

linux-guest: ## Build a Linux to boot and fork, from Debian's packages: target/linux-guest
	resources/linux/build.sh

# From the cache in a moment; the first time in some minutes, with apt-get as root.
linux-guest-if-possible:
	@resources/linux/build.sh || \
		echo "********** SKIPPED: all tests with a Linux guest, since it could not be built **********"

linux-figures: build linux-guest ## Measure boot and fork of the Linux guest
	resources/linux/figures.sh

clean: ## Remove what was built
	$(CARGO) clean

# What one does with this repository. Each target installs and builds what it needs, on a fresh
# Debian machine too; `make help` lists them.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

STATIC_TARGET := x86_64-unknown-linux-gnu
SCRIPTS := $(wildcard scripts/*.sh) .ci/run

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: run
run: run-packages ## boot the guest: to a shell in a terminal, else to its report
	cargo build --release
	scripts/guest.sh
	@arguments=(run --kernel target/guest/vmlinux --initrd target/guest/initramfs.cpio); \
	if [ -t 0 ] && [ -t 1 ]; then arguments+=(--append alcove.shell); fi; \
	echo "target/release/alcove $${arguments[*]}"; \
	target/release/alcove "$${arguments[@]}"

.PHONY: test
test: test-packages guest lab lint build ## check everything: style, documents, all tests
	cargo nextest run --workspace
	cargo test --workspace --doc
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --quiet

.PHONY: build
build: ## compile the debug build
	cargo build --workspace

.PHONY: static
static: ## compile a release build without shared libraries
	RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --target $(STATIC_TARGET)

.PHONY: start-up
start-up: guest lab static ## measure a start in the lab: time to the first output and to init, memory
	scripts/start-up.sh

.PHONY: bench
bench: guest lab static ## measure it all in the lab, and say what changed since the last time
	scripts/bench.sh

.PHONY: micro-bench
micro-bench: run-packages ## measure queues, the bus and the assist alone, on this host
	cargo bench --features fuzzing --bench micro

.PHONY: fuzz
fuzz: run-packages ## run each fuzz target for a minute; scripts/fuzz.sh takes the seconds and targets
	scripts/fuzz.sh

.PHONY: soak
soak: guest lab ## let hostile guests attack their devices 20 million times, here and in the lab
	scripts/soak.sh

.PHONY: guest
guest: run-packages ## build the guest's kernel and initramfs into target/guest
	scripts/guest.sh

.PHONY: lab
lab: test-packages ## build what the lab runs: its image, a static alcove, the tests, kernels
	@mkdir -p target/guest
	kernels=$$(scripts/cached.sh debian scripts/debian-kernels.sh) && cp --update "$$kernels"/* target/guest/
	scripts/cached.sh qemu scripts/lab-qemu.sh >/dev/null
	scripts/cached.sh lab scripts/lab-image.sh resources/lab/{init,modules,hold.c} >/dev/null
	scripts/lab-programs.sh

.PHONY: lab-shell
lab-shell: guest lab ## open a shell on emulated AMD-V hardware, with alcove and the guest
	scripts/lab.sh threads alcove=target/lab/alcove guest=target/guest

.PHONY: lint
lint: test-packages ## check style: rustfmt, clippy, shellcheck
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	shellcheck $(SCRIPTS)
	shellcheck --shell dash --exclude SC3043 resources/guest/init
	shellcheck --shell dash --exclude SC3043 resources/lab/init

.PHONY: clean
clean: ## remove what was built here; the cache of the guest stays
	cargo clean

.PHONY: run-packages test-packages
run-packages test-packages: %-packages:
	@scripts/packages.sh $*

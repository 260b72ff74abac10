//! Tests of the layered storage.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::devices::Access;
use crate::devices::gate::CompletionGate;
use crate::devices::memory::{Buffer, Span};
use crate::devices::testing::{MemoryFiles, TestRam};
use crate::words::Gpa;

const BYTES: u64 = 64 * BLOCK;

fn empty() -> (Arc<MemoryFiles>, Arc<Backing>) {
    let files = Arc::new(MemoryFiles::default());
    let backing = Backing::new(None, BYTES, files.clone()).expect("64 blocks are not too many");
    (files, backing)
}

/// A pinned span of fresh memory with these bytes.
fn span(bytes: &[u8]) -> (TestRam, Span) {
    let ram = TestRam::new(0, bytes.len().div_ceil(4096));
    ram.set(0, bytes);
    let held = Arc::new(AtomicUsize::new(0));
    let buffer = Buffer::pin(&ram, Gpa(0), bytes.len(), Access::ReadWrite, &held);
    let span = buffer.expect("the range is memory").span(Gpa(0), bytes.len());
    (ram, span.expect("all of the buffer"))
}

fn begin_write(backing: &Arc<Backing>, offset: u64, bytes: &[u8]) -> WritePlan {
    let (_ram, span) = span(bytes);
    let plan = backing.plan_write(offset, bytes.len()).expect("in range");
    plan.transfer(&span, 0, bytes.len()).expect("the file takes it");
    plan
}

fn write(backing: &Arc<Backing>, offset: u64, bytes: &[u8]) {
    begin_write(backing, offset, bytes).commit().expect("the file takes it");
}

fn end_read(plan: &ReadPlan, len_bytes: usize) -> Vec<u8> {
    let (ram, span) = span(&vec![0xee; len_bytes]);
    plan.transfer(&span, 0, len_bytes).expect("the file has it");
    ram.bytes(0, len_bytes)
}

fn read(backing: &Arc<Backing>, offset: u64, len_bytes: usize) -> Vec<u8> {
    let plan = backing.plan_read(offset, len_bytes).expect("in range");
    end_read(&plan, len_bytes)
}

fn freeze(backing: &Arc<Backing>) -> BackingState {
    let state = backing.freeze(&CompletionGate::new().hold());
    let bytes = postcard::to_stdvec(&state).expect("a state is plain data");
    postcard::from_bytes(&bytes).expect("just serialised")
}

#[test]
fn unwritten_blocks_are_zeros_and_ranges_are_checked() {
    let (_, backing) = empty();
    assert_eq!(read(&backing, 100, 9000), vec![0; 9000]);
    for (offset, len_bytes) in [(BYTES, 1), (BYTES - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 4)] {
        assert!(backing.plan_read(offset, len_bytes).is_err());
        assert!(backing.plan_write(offset, len_bytes).is_err());
    }
    assert_eq!(backing.own_blocks(), 0);
    let files = Arc::new(MemoryFiles::default());
    assert!(Backing::new(None, MAX_BACKING_BYTES + 1, files).is_err());
}

#[test]
fn random_writes_in_flight_together_agree_with_a_plain_array() {
    // A fixed linear congruential sequence: reproducible, no dependency.
    let mut state = 7_u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % below
    };
    let (files, mut backing) = empty();
    let mut model = vec![0_u8; index(BYTES)];
    let mut clones = Vec::new();
    for round in 0..600 {
        let mut under_way = Vec::new();
        for n in 0..1 + random(3) {
            let offset = random(BYTES);
            let len_bytes = index((1 + random(12_000)).min(BYTES - offset));
            let [byte, ..] = (round * 3 + n + 1).to_le_bytes();
            let bytes = vec![byte; len_bytes];
            under_way.push((offset, begin_write(&backing, offset, &bytes), bytes));
        }
        for (offset, plan, bytes) in under_way {
            if random(8) > 0 {
                plan.commit().expect("the file takes it");
                let offset = index(offset);
                model[offset..offset + bytes.len()].copy_from_slice(&bytes);
            }
        }
        if round % 100 == 50 {
            let clone = Backing::restore(&freeze(&backing), None, files.clone());
            let clone = clone.expect("all files are there");
            // The lineage goes on in the clone; the source stays as it is, to be checked at the end.
            clones.push((std::mem::replace(&mut backing, clone), model.clone()));
        }
        let offset = random(BYTES - 5000);
        let start = index(offset);
        assert_eq!(read(&backing, offset, 5000), model[start..start + 5000], "round {round}");
    }
    for (source, model) in clones {
        assert_eq!(read(&source, 0, model.len()), model);
    }
    assert_eq!(read(&backing, 0, model.len()), model);
}

#[test]
fn a_frozen_map_never_shows_a_later_write() {
    let (files, source) = empty();
    write(&source, 0, &[1; 4096]);
    let in_flight = begin_write(&source, 0, &[2; 4096]);
    let state = freeze(&source);
    let clone = Backing::restore(&state, None, files).expect("all files are there");
    in_flight.commit().expect("the file takes it");
    for n in 3..20 {
        write(&source, 0, &[n; 4096]);
    }
    assert_eq!(read(&source, 0, 4096), [19; 4096]);
    assert_eq!(read(&clone, 0, 4096), [1; 4096]);
    write(&clone, 100, &[9; 10]);
    assert_eq!(read(&source, 0, 4096), [19; 4096]);
    let mut expected = vec![1; 4096];
    expected[100..110].fill(9);
    assert_eq!(read(&clone, 0, 4096), expected);
}

#[test]
fn overwriting_for_ever_does_not_grow_the_file() {
    let (_, backing) = empty();
    for n in 0..10_000_u32 {
        let [byte, ..] = n.to_le_bytes();
        write(&backing, u64::from(n % 4) * 5000, &[byte; 6000]);
    }
    assert!(backing.own_blocks() <= 16, "{} blocks", backing.own_blocks());
    for _ in 0..100 {
        drop(begin_write(&backing, 0, &[0; 4096]));
    }
    assert!(backing.own_blocks() <= 16);
    assert_eq!(read(&backing, 15_000, 6000), [9_999_u32.to_le_bytes()[0]; 6000]);
}

#[test]
fn an_extent_is_not_reused_under_a_read() {
    let (_, backing) = empty();
    write(&backing, 0, &[1; 4096]);
    let plan = backing.plan_read(0, 4096).expect("in range");
    for n in 2..10 {
        write(&backing, 0, &[n; 4096]);
    }
    assert_eq!(end_read(&plan, 4096), [1; 4096]);
    let grown = backing.own_blocks();
    drop(plan);
    for n in 0..10 {
        write(&backing, 4096, &[n; 4096]);
    }
    assert_eq!(backing.own_blocks(), grown, "the read's extent is free again");
}

#[test]
fn a_base_shows_through_and_stays_as_it_is() {
    let files = Arc::new(MemoryFiles::default());
    let (_, base) = files.create().expect("a file in memory");
    base.write_all_at(&[7; 5000], 0).expect("a file in memory");
    let copy = |file: &File| file.try_clone().expect("one more descriptor");
    let backing = Backing::new(Some(copy(&base)), 9000, files.clone()).expect("small");
    assert_eq!(backing.bytes(), 9000);
    write(&backing, 4999, &[1; 2]);
    let mut expected = vec![7; 4999];
    expected.extend([1, 1]);
    expected.resize(9000, 0);
    assert_eq!(read(&backing, 0, 9000), expected);
    let state = freeze(&backing);
    assert!(matches!(Backing::restore(&state, None, files.clone()), Err(BackingError::Base { .. })));
    let clone = Backing::restore(&state, Some(copy(&base)), files).expect("all files are there");
    assert_eq!(read(&clone, 0, 9000), expected);
    let mut bytes = [0; 5000];
    base.read_exact_at(&mut bytes, 0).expect("a file in memory");
    assert_eq!(bytes, [7; 5000]);
}

#[test]
fn a_layer_that_no_block_needs_is_let_go() {
    let (files, source) = empty();
    write(&source, 0, &[1; 8192]);
    let clone = Backing::restore(&freeze(&source), None, files).expect("all files are there");
    assert_eq!(freeze(&clone).files.iter().flatten().count(), 1);
    write(&clone, 0, &[2; 4096]);
    assert_eq!(freeze(&clone).files.iter().flatten().count(), 2);
    write(&clone, 4096, &[2; 4096]);
    assert_eq!(freeze(&clone).files.iter().flatten().count(), 1);
    assert_eq!(lock(&clone.inner).layers.iter().flatten().count(), 1, "its file is closed");
}

#[test]
fn a_damaged_state_is_refused() {
    let wire = |bytes, runs| WireState { bytes, base_bytes: None, files: vec![Some(ExtentFileId(0))], runs };
    let run = |block, blocks, file, extent| vec![Run { block, blocks, place: Place { file, extent } }];
    assert!(BackingState::try_from(wire(8192, run(0, 2, 0, 5))).is_ok());
    for runs in [run(1, 2, 0, 0), run(u64::MAX, 2, 0, 0), run(0, 1, 1, 0), run(0, 2, 0, u32::MAX)] {
        assert!(BackingState::try_from(wire(8192, runs)).is_err());
    }
    assert!(BackingState::try_from(wire(u64::MAX, Vec::new())).is_err());
}

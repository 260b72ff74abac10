//! Tests of [`ArenaDir`], on every kind that the host allows.
#![expect(unsafe_code, reason = "maps files, to see which pages the host gives")]

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::ptr::null_mut;

use rustix::fs::{Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::*;
use crate::ipc::Channel;
use crate::ipc::spawn::{Ending, adopt, spawn_self};

const BUDGET_BYTES: u64 = 64 << 20;
const LEAF: u64 = 2 << 20;

/// An arena of every kind that this host allows; says loudly what is left out.
fn arenas(test: &str) -> Vec<ArenaDir> {
    let wanted = [
        (ArenaChoice::Best, ArenaKind::HugeTmpfs),
        (ArenaChoice::SmallPages, ArenaKind::Tmpfs),
        (ArenaChoice::Memfd, ArenaKind::Memfd),
    ];
    let arenas = wanted.map(|(choice, kind)| {
        let arena = ArenaDir::create_as(choice, BUDGET_BYTES).expect("an arena of some kind");
        let is_there = arena.kind() == kind;
        if !is_there {
            println!("SKIPPED: {test} on {kind:?}: this host gives {:?}", arena.kind());
        }
        is_there.then_some(arena)
    });
    arenas.into_iter().flatten().collect()
}

fn tmpfs_arenas(test: &str) -> Vec<ArenaDir> {
    arenas(test).into_iter().filter(|arena| arena.kind() != ArenaKind::Memfd).collect()
}

fn parts(arena: &ArenaDir) -> (ArenaReader, ArenaWriter) {
    let (description, descriptors) = arena.share_with_member();
    let owned = descriptors.iter().map(|fd| fd.try_clone_to_owned().expect("dup")).collect();
    ArenaDir::from_parts(&description, owned).expect("parts")
}

fn text(file: OwnedFd) -> String {
    let mut text = vec![0; 5];
    File::from(file).read_exact_at(&mut text, 0).expect("read");
    String::from_utf8(text).expect("text")
}

fn write(file: &OwnedFd, bytes: &[u8], offset: u64) {
    rustix::io::retry_on_intr(|| rustix::io::pwrite(file, bytes, offset)).expect("write");
}

#[test]
fn a_file_is_written_by_one_and_read_by_name_by_others() {
    for arena in arenas("a_file_is_written_by_one_and_read_by_name_by_others") {
        let (reader, writer) = parts(&arena);
        let file = arena.create_file("cut-1", 4 * LEAF).expect("create");
        assert_eq!(rustix::fs::fstat(&file).expect("stat").st_size, 8 << 20);
        write(&file, b"first", 0);
        assert_eq!(text(reader.open_read_only("cut-1").expect("open")), "first");
        assert_eq!(text(arena.open_read_only("cut-1").expect("open")), "first");
        let error = arena.create_file("cut-1", LEAF).expect_err("taken");
        assert!(matches!(error, ArenaError::File { action: "create", .. }), "{error}");

        let file = writer.create_file("extent-7", LEAF).expect("create");
        write(&file, b"other", 0);
        arena.adopt("extent-7", file.try_clone().expect("dup")).expect("adopt");
        arena.adopt("extent-7", file.try_clone().expect("dup")).expect("adopt again");
        drop(file);
        assert_eq!(text(reader.open_read_only("extent-7").expect("open")), "other");
        assert_eq!(text(arena.open_read_only("extent-7").expect("open")), "other");
        let stranger = arena.create_file("stranger", LEAF).expect("create");
        assert!(arena.adopt("extent-7", stranger).is_err(), "{:?}", arena.kind());
    }
}

#[test]
fn a_removed_name_is_gone_for_all() {
    for arena in arenas("a_removed_name_is_gone_for_all") {
        let (reader, _) = parts(&arena);
        let file = arena.create_file("a", LEAF).expect("create");
        let open = reader.open_read_only("a").expect("open");
        write(&file, b"still", 0);
        arena.remove("a").expect("remove");
        for result in [reader.open_read_only("a"), arena.open_read_only("a")] {
            assert!(result.expect_err("removed").is_not_found(), "{:?}", arena.kind());
        }
        assert!(arena.remove("a").expect_err("removed").is_not_found());
        assert_eq!(text(open), "still");
    }
}

#[test]
fn what_a_reader_opened_cannot_be_opened_for_writing() {
    for arena in arenas("what_a_reader_opened_cannot_be_opened_for_writing") {
        let (reader, _) = parts(&arena);
        arena.create_file("a", LEAF).expect("create");
        for file in [reader.open_read_only("a"), arena.open_read_only("a")].map(|file| file.expect("open")) {
            assert_eq!(rustix::io::pwrite(&file, b"x", 0), Err(Errno::BADF));
            let again = rustix::fs::open(own_path(file.as_fd()), OFlags::RDWR, Mode::empty());
            let is_root = rustix::process::geteuid().is_root();
            match (arena.guards_readers(), is_root) {
                (true, _) => assert_eq!(again.expect_err("guarded"), Errno::ROFS),
                (false, false) => assert_eq!(again.expect_err("file mode"), Errno::ACCESS),
                (false, true) => {
                    println!("SKIPPED: root can reopen files of {:?} here", arena.kind())
                }
            }
        }
    }
}

#[test]
fn memory_is_given_back_with_the_last_descriptor() {
    for arena in arenas("memory_is_given_back_with_the_last_descriptor") {
        assert_eq!(arena.used_bytes().expect("used"), 0);
        let file = arena.create_file("a", 8 * LEAF).expect("create");
        assert_eq!(arena.used_bytes().expect("used"), 0, "sparse");
        for leaf in [0, 3, 7] {
            write(&file, &vec![7; LEAF_BYTES], leaf * LEAF);
        }
        assert_eq!(arena.used_bytes().expect("used"), 3 * LEAF);
        let reader = arena.open_read_only("a").expect("open");
        arena.remove("a").expect("remove");
        drop(file);
        if arena.kind() != ArenaKind::Memfd {
            assert_eq!(arena.used_bytes().expect("used"), 3 * LEAF);
        }
        drop(reader);
        assert_eq!(arena.used_bytes().expect("used"), 0, "{:?}", arena.kind());
    }
}

#[test]
fn a_small_file_takes_memory_by_the_page_and_is_guarded_and_removed_like_any() {
    for arena in arenas("a_small_file_takes_memory_by_the_page_and_is_guarded_and_removed_like_any") {
        let (reader, _) = parts(&arena);
        let file = arena.create_small_file("patches", 4 * LEAF).expect("create");
        write(&file, b"small", LEAF);
        if arena.kind() != ArenaKind::Memfd {
            assert_eq!(arena.used_bytes().expect("used"), 4096, "{:?}", arena.kind());
        }
        let open = reader.open_read_only("patches").expect("open");
        let mut bytes = [0; 5];
        File::from(open.try_clone().expect("dup")).read_exact_at(&mut bytes, LEAF).expect("read");
        assert_eq!(&bytes, b"small");
        if arena.guards_readers() {
            let again = rustix::fs::open(own_path(open.as_fd()), OFlags::RDWR, Mode::empty());
            assert_eq!(again.expect_err("guarded"), Errno::ROFS);
        }
        arena.remove("patches").expect("remove");
        assert!(reader.open_read_only("patches").expect_err("removed").is_not_found());
        drop((file, open));
        assert_eq!(arena.used_bytes().expect("used"), 0, "{:?}", arena.kind());
    }
}

#[test]
fn a_full_arena_is_an_error_and_has_room_again_after_a_removal() {
    for arena in tmpfs_arenas("a_full_arena_is_an_error_and_has_room_again_after_a_removal") {
        let file = File::from(arena.create_file("big", 4 * BUDGET_BYTES).expect("create"));
        let block = vec![1; LEAF_BYTES];
        let full = (0..64).map(|leaf| file.write_all_at(&block, leaf * LEAF)).position(|result| {
            let is_full = result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::StorageFull);
            assert!(is_full || result.is_ok(), "{result:?}");
            is_full
        });
        assert_eq!(full, Some(32), "budget of {BUDGET_BYTES} bytes, {:?}", arena.kind());
        let other = File::from(arena.create_file("other", LEAF).expect("create"));
        assert!(other.write_all_at(&block, 0).is_err());
        arena.remove("big").expect("remove");
        drop(file);
        // A child that another test starts has the file open too, until it has become its program.
        let begun = std::time::Instant::now();
        while let Err(error) = other.write_all_at(&block, 0) {
            assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
            assert!(begun.elapsed() < std::time::Duration::from_secs(10), "no room: {error}");
            std::thread::yield_now();
        }
    }
}

/// `KiB` of the line `field` of the mapping that starts at `address`.
fn smaps_kib(address: usize, field: &str) -> u64 {
    let mut smaps = String::new();
    File::open("/proc/self/smaps").and_then(|mut file| file.read_to_string(&mut smaps)).expect("smaps");
    let start = format!("{address:x}-");
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
    let line = lines.find(|line| line.starts_with(field)).expect("the field");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

/// Maps one leaf of `file` for reading, aligned, reads it all, and says how much of it is huge.
fn huge_kib_of_a_mapped_leaf(file: &OwnedFd, offset: u64) -> u64 {
    // SAFETY: an anonymous reservation at a place that the kernel chooses; a leaf of the file over an
    // aligned part of it; reads of the leaf while it is mapped; then all of it is unmapped.
    unsafe {
        let protection = ProtFlags::empty();
        let all = rustix::mm::mmap_anonymous(null_mut(), 2 * LEAF_BYTES, protection, MapFlags::PRIVATE)
            .expect("reserve");
        let aligned = all.add(all.align_offset(LEAF_BYTES));
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        rustix::mm::mmap(aligned, LEAF_BYTES, ProtFlags::READ, flags, file, offset).expect("map");
        let sum: u64 = (0..LEAF_BYTES).step_by(4096).map(|at| u64::from(*aligned.cast::<u8>().add(at))).sum();
        assert_eq!(sum, 512 * 9);
        let kib = smaps_kib(aligned.addr(), "ShmemPmdMapped");
        rustix::mm::munmap(all, 2 * LEAF_BYTES).expect("unmap");
        kib
    }
}

/// Whether the kernel has 2 MiB of free memory in one piece: cached files may have taken all of it.
fn has_free_huge_page() -> bool {
    // A line for each zone: four words, then the free blocks of 4 KiB, 8 KiB, and so on.
    let zones = std::fs::read_to_string("/proc/buddyinfo").expect("proc(5)");
    zones.lines().any(|zone| zone.split_whitespace().skip(4 + 9).any(|free| free != "0"))
}

#[test]
fn a_block_written_at_once_is_one_huge_page() {
    for arena in arenas("a_block_written_at_once_is_one_huge_page") {
        let file = arena.create_file("a", 4 * LEAF).expect("create");
        assert_eq!(rustix::io::pwrite(&file, &vec![9; LEAF_BYTES], 2 * LEAF), Ok(LEAF_BYTES));
        let kib = huge_kib_of_a_mapped_leaf(&parts(&arena).0.open_read_only("a").expect("open"), 2 * LEAF);
        match arena.kind() {
            ArenaKind::HugeTmpfs if kib == 0 && !has_free_huge_page() => {
                println!("SKIPPED: a_block_written_at_once_is_one_huge_page: the host has none free now");
            }
            ArenaKind::HugeTmpfs => assert_eq!(kib, 2048),
            ArenaKind::Tmpfs => assert_eq!(kib, 0),
            // The host's shmem_enabled decides.
            ArenaKind::Memfd => {}
        }
    }
}

/// Tells the test binary, started again, that it is the member.
const ROLE: &str = "SALP_ARENA_TEST_ROLE";

#[test]
fn a_member_reads_and_creates_files_in_its_own_process() {
    if env::var_os(ROLE).is_some() {
        play_member();
        // Before the harness reports a test that is none.
        std::process::exit(0);
    }
    for arena in arenas("a_member_reads_and_creates_files_in_its_own_process") {
        let file = arena.create_file("cut", LEAF).expect("create");
        write(&file, b"hello", 0);
        let (here, there) = Channel::pair().expect("pair");
        let path = module_path!().split_once("::").expect("a module of the crate").1;
        let name = format!("{path}::a_member_reads_and_creates_files_in_its_own_process");
        let arguments = [OsStr::new(&name), OsStr::new("--exact"), OsStr::new("--nocapture")];
        let member =
            spawn_self(&arguments, &[(ROLE, OsStr::new("1"))], &[(there.as_fd(), 3)]).expect("spawn");
        drop(there);
        let (description, descriptors) = arena.share_with_member();
        here.send(&description, &descriptors).expect("send");
        let (name, mut files) = here.receive::<String>().expect("receive").expect("open");
        arena.adopt(&name, files.pop().expect("a file")).expect("adopt");
        // Another member would find it by its name alone, and so does this one.
        here.send(&(), &[]).expect("send");
        let (seen, _) = here.receive::<String>().expect("receive").expect("open");
        assert_eq!(seen, "hello, world");
        assert_eq!(text(arena.open_read_only(&name).expect("open")), "world");
        drop(here);
        assert_eq!(member.wait().expect("wait"), Ending::Exited(0));
    }
}

fn play_member() {
    let channel = Channel::from_fd(adopt(3).expect("adopt")).expect("channel");
    let (description, descriptors) = channel.receive().expect("receive").expect("open");
    let (reader, writer) = ArenaDir::from_parts(&description, descriptors).expect("parts");
    let hello = text(reader.open_read_only("cut").expect("open"));
    let file = writer.create_file("extent-of-a-member", LEAF).expect("create");
    write(&file, b"world", 0);
    channel.send(&"extent-of-a-member", &[file.as_fd()]).expect("send");
    drop(file);
    channel.receive::<()>().expect("receive");
    let world = text(reader.open_read_only("extent-of-a-member").expect("open"));
    channel.send(&format!("{hello}, {world}"), &[]).expect("send");
    assert!(channel.receive::<()>().expect("receive").is_none());
}

#[test]
fn two_arenas_do_not_see_each_other() {
    let test = "two_arenas_do_not_see_each_other";
    for (one, other) in arenas(test).iter().zip(arenas(test)) {
        one.create_file("a", LEAF).expect("create");
        assert!(parts(&other).0.open_read_only("a").expect_err("not there").is_not_found());
        other.create_file("a", LEAF).expect("create");
    }
}

#[test]
fn names_budgets_choices_and_parts_are_checked() {
    let arena = ArenaDir::create_as(ArenaChoice::Memfd, BUDGET_BYTES).expect("arena");
    let long = "x".repeat(NAME_LIMIT_BYTES + 1);
    for name in ["", ".", "..", "a/b", "../a", "a b", "a\0", &long] {
        let error = arena.create_file(name, LEAF).expect_err("name");
        assert!(matches!(error, ArenaError::Name { .. }), "{error}");
    }
    arena.create_file(&long[1..], LEAF).expect("the longest name");
    for budget_bytes in [0, LEAF - 1] {
        let error = ArenaDir::create_as(ArenaChoice::Best, budget_bytes).expect_err("budget");
        assert!(matches!(error, ArenaError::Budget { .. }), "{error}");
    }
    assert_eq!(ArenaChoice::parse(OsStr::new("small")).expect("known"), ArenaChoice::SmallPages);
    assert_eq!(ArenaChoice::parse(OsStr::new("memfd")).expect("known"), ArenaChoice::Memfd);
    assert!(matches!(ArenaChoice::parse(OsStr::new("large")), Err(ArenaError::Choice { .. })));
    let (description, _) = arena.share_with_member();
    let stray = File::open("/dev/zero").expect("open").into();
    assert!(matches!(
        ArenaDir::from_parts(&description, vec![stray]),
        Err(ArenaError::Parts { count: 1, .. })
    ));
}

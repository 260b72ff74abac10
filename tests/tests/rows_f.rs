//! Rows F of the conformance table: families.

use salp::family::VmId;
use salp::member::messages::GuestKind;
use salp::space::Keep;
use salp::words::Gfn;
use salp_protocol::order;
use salp_tests::axes::{LEVEL, MEMORY};
use salp_tests::both_guests;
use salp_tests::row::{ALONE, DEVICE, EMPTY, FULL, NEW, OLD, OTHER, at, run, write_memory};
use salp_tests::world::{LIMIT, Setup, World};

both_guests! {
    f1_three_generations_write_in_all_orders;
    f2_a_chain_of_sixteen;
    f3_exits_in_all_orders;
    f4_a_pinned_page_of_a_clone;
    f5_a_second_fork_before_the_first_is_published;
    f6_a_clone_forks_before_it_is_published;
    f6_a_fresh_clone_forks_at_once;
    f7_a_guest_forks_itself;
}

const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

fn f1_three_generations_write_in_all_orders(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        for order in ORDERS {
            let child = row.fork_and_publish();
            let grandchild = row.world.fork(child);
            row.publish(child);
            let vms = [row.parent, child, grandchild];
            let old = row.world.load(row.parent, row.page.gpa());
            for (step, who) in order.into_iter().enumerate() {
                row.store(vms[who], NEW + who as u64);
                for (of, vm) in vms.into_iter().enumerate() {
                    let has_written = order[..=step].contains(&of);
                    row.expect(vm, if has_written { NEW + of as u64 } else { old });
                }
            }
            row.world.check();
            row.world.end(grandchild);
            row.world.end(child);
        }
    });
}

/// VM `depth` of the chain writes page `depth` of the full leaf and of an untouched one.
fn f2_a_chain_of_sixteen(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        const DEPTH: u64 = 16;
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let places = |page: u64| [Gfn(FULL.first_gfn().0 + page), Gfn(EMPTY.first_gfn().0 + page)];
        let mut chain = vec![root];
        let mut figures = Vec::new();
        for depth in 1..=DEPTH {
            let forked = world.fork_many(chain[chain.len() - 1], 1);
            let clone = forked.clones[0].vm;
            places(depth).into_iter().for_each(|gfn| world.store(clone, gfn.gpa(), NEW + depth));
            chain.push(clone);
            figures.push(forked.figures);
        }
        // From the second fork on the sources are alike: clones that have written two leaves (and the
        // built-in guest's own).
        let of =
            |at: usize| (figures[at].copied_pages, figures[at].protected_leaves, figures[at].protect_calls);
        for at in 2..figures.len() {
            assert_eq!((of(at).0, of(at).1), (of(1).0, of(1).1), "depth {}", at + 1);
            assert!(of(at).2 <= of(1).2, "depth {}: {:?}, at depth 2 {:?}", at + 1, of(at), of(1));
        }
        for (depth, vm) in (0..).zip(&chain) {
            for page in 1..=DEPTH {
                let [full, empty] = places(page);
                let is_written = page <= depth;
                world.expect(*vm, full.gpa(), if is_written { NEW + page } else { OLD });
                world.expect(*vm, empty.gpa(), if is_written { NEW + page } else { 0 });
            }
        }
        world.check();
        // The middle goes first, and its pages stay with those below.
        for vm in chain.drain(4..12) {
            world.end(vm);
        }
        let last = chain[chain.len() - 1];
        world.expect(last, places(9)[0].gpa(), NEW + 9);
        world.finish();
    });
}

fn f3_exits_in_all_orders(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        for (number, order) in ORDERS.into_iter().enumerate() {
            for is_published in [false, true] {
                let root = world.root();
                write_memory(&world, root);
                let child = world.fork(root);
                world.store(child, ALONE.gpa(), NEW);
                let grandchild = world.fork(child);
                let vms = [root, child, grandchild];
                if is_published {
                    world.publish_all(root, if number % 2 == 0 { Keep::Own } else { Keep::Shared });
                    world.publish_all(child, Keep::Own);
                } else {
                    // Ends fall into the publication: nobody waits for it.
                    world.tell(root, salp::member::messages::Order::Publish { keep: Keep::Own });
                }
                let holds = [OLD, NEW, NEW];
                for (step, who) in order.into_iter().enumerate() {
                    world.end(vms[who]);
                    for left in &order[step + 1..] {
                        world.expect(vms[*left], ALONE.gpa(), holds[*left]);
                        world.expect(vms[*left], FULL.gfn(step).gpa(), OLD);
                    }
                    world.check();
                }
                world.end_all();
            }
        }
    });
}

fn f4_a_pinned_page_of_a_clone(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork_and_publish();
        row.world.pin(child, row.page, 1);
        row.device_store(child, DEVICE);
        let forked = row.world.fork_many(child, 1);
        assert_eq!(forked.figures.copied_pages, 1, "{}", row.point);
        row.device_store(child, OTHER);
        row.publish(child);
        row.expect(row.parent, row.old);
        row.expect(child, OTHER);
        row.expect(forked.clones[0].vm, DEVICE);
        row.world.check();
        row.world.unpin(child, row.page, 1);
    });
}

fn f5_a_second_fork_before_the_first_is_published(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let first = row.fork();
        row.store(row.parent, NEW);
        let second = row.fork();
        row.store(row.parent, OTHER);
        row.publish(row.parent);
        row.expect(first, row.old);
        row.expect(second, NEW);
        row.expect(row.parent, OTHER);
    });
}

fn f6_a_clone_forks_before_it_is_published(test: &str, guest: GuestKind) {
    run(test, guest, MEMORY, |row| {
        let child = row.fork();
        row.store(child, NEW);
        let grandchild = row.world.fork(child);
        row.store(child, OTHER);
        row.store(row.parent, DEVICE);
        row.publish(row.parent);
        row.publish(child);
        row.expect(grandchild, NEW);
        row.expect(child, OTHER);
        row.expect(row.parent, DEVICE);
    });
}

/// A clone that has touched nothing has nothing to publish: its cut is over as soon as it is taken,
/// and must still be there for the clone of the clone.
fn f6_a_fresh_clone_forks_at_once(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        for _ in 0..10 {
            let mut chain: Vec<VmId> = vec![world.fork(root)];
            for _ in 0..3 {
                let forked = world.fork_running(chain[chain.len() - 1], 2);
                forked.clones.iter().for_each(|clone| world.await_puppets(clone.vm));
                chain.extend(forked.clones.iter().map(|clone| clone.vm));
            }
            world.expect(chain[chain.len() - 1], FULL.gpa(), OLD);
            chain.into_iter().for_each(|vm| world.end(vm));
        }
        world.finish();
    });
}

fn f7_a_guest_forks_itself(test: &str, guest: GuestKind) {
    at(test, guest, LEVEL, |point| {
        let world = World::at(point, Setup::default());
        let root = world.root();
        write_memory(&world, root);
        let mut source = root;
        for round in 1..=4_u32 {
            let id = world.run(source, order::FORK, 0, 0);
            let clone = VmId(u32::try_from(id).expect("the clone's id"));
            assert!(world.colony.vms().contains(&clone), "round {round}: {clone} is the clone's id");
            assert_eq!(world.colony.parent(clone), Some(source));
            assert_eq!(world.result(clone, 0), 0, "round {round}: the call returns 0 in the clone");
            world.store(source, ALONE.gpa(), NEW + u64::from(round));
            world.expect(clone, ALONE.gpa(), if round == 1 { OLD } else { NEW + u64::from(round) - 1 });
            world.store(clone, ALONE.gpa(), NEW + u64::from(round));
            // Once in each: nothing more comes.
            for vm in [source, clone] {
                assert_eq!(world.run(vm, order::NOTHING, 0, 0), 0);
                assert!(world.member(vm).state().puppet_results.is_empty(), "{vm}");
            }
            source = if round % 2 == 0 { clone } else { source };
        }
        world.finish();
    });
}

/// The guest's own case: forks itself, again and again, and its clones do.
#[test]
fn f7_the_fork_case_verifies_itself_kvm() {
    let test = "f7_the_fork_case_verifies_itself_kvm";
    let command_line = "case=fork mib=2 rounds=3 nest=1".to_owned();
    let setup = Setup { command_line, ..Setup::default() };
    let Some(world) = World::new(test, GuestKind::Kvm, &setup) else { return };
    world.root();
    // The source and 3 clones, each of which forks 3 times.
    let mut done: Vec<VmId> = Vec::new();
    while done.len() < 13 {
        let running = world.colony.vms().into_iter().find(|vm| !done.contains(vm));
        let Some(vm) = running else {
            std::thread::yield_now();
            continue;
        };
        let ended =
            world.member(vm).wait_for(LIMIT, |state| state.ended.clone().map(|end| (end, state.progress)));
        let ((status, text), progress) = ended.unwrap_or_else(|error| panic!("{vm}: {error}"));
        assert_eq!(status, Some(0), "{vm}: {text}");
        assert!(progress.is_finished && progress.errors == 0, "{vm}: {progress:?}");
        done.push(vm);
    }
    world.finish();
}

use salp::member::messages::{GuestKind, Order, Publication, PuppetOrder, Reply};
use salp::space::Keep;
use salp::words::Gfn;
use salp_protocol::order;
use salp_tests::world::{Setup, World};
use std::time::Instant;
#[test]
fn tmp() {
    for bg in [true, false] {
        let world = World::new(
            "t",
            GuestKind::Kvm,
            &Setup {
                memory_mib: 128,
                publication: Publication { in_background: bg, keep: Keep::Own, keep_later: Keep::Own },
                ..Setup::default()
            },
        )
        .expect("x");
        let root = world.root();
        world.colony.warm().unwrap();
        for i in 0..4 {
            world.store_pages(root, Gfn(1024), 62 * 512, 7 + i);
            world.colony.settle();
            world.colony.warm().unwrap();
            let t0 = Instant::now();
            let f = world.colony.fork(root, 1).unwrap();
            let clone = f.clones[0].vm;
            let t1 = t0.elapsed();
            let d0 = match world.colony.ask(clone, Order::Describe) {
                Ok(Reply::Describe(d)) => *d,
                _ => panic!(),
            };
            world.begin(
                clone,
                0,
                PuppetOrder { order: order::SUM_STRIDE, a: 4 << 20, b: 0, c: 256, d: 4096 },
            );
            world.result(clone, 0);
            let t2 = t0.elapsed();
            world.result(clone, 0);
            let t3 = t0.elapsed();
            world.begin(
                clone,
                0,
                PuppetOrder { order: order::SUM_STRIDE, a: (4 << 20) + (1 << 20), b: 0, c: 256, d: 4096 },
            );
            world.result(clone, 0);
            let t4 = t0.elapsed();
            let d1 = match world.colony.ask(clone, Order::Describe) {
                Ok(Reply::Describe(d)) => *d,
                _ => panic!(),
            };
            world.tell(clone, Order::Quiesce);
            let d2 = match world.colony.ask(clone, Order::Describe) {
                Ok(Reply::Describe(d)) => *d,
                _ => panic!(),
            };
            let k: Vec<_> = d2.kvm.iter().filter(|(k, v)| **v > 0).collect();
            eprintln!(
                "bg {bg} call {t1:?} first {t2:?} mib {t3:?} next mib {t4:?} minflt {} resolved {} kvm {:?}",
                d1.minor_faults - d0.minor_faults,
                d1.leaves_resolved,
                k
            );
            world.tell(clone, Order::Resume);
            world.colony.end(clone).unwrap();
        }
    }
}

//! One fork, from end to end.

use super::maps::maps;
use super::nursery::{Axes, Nursery};
use crate::space::Keep;
use crate::words::{Gfn, LEAF_PAGES, wide};

#[test]
fn a_fork_is_a_copy_and_leaves_nothing_registered() {
    for axes in Axes::ALL {
        let test = "a_fork_is_a_copy_and_leaves_nothing_registered";
        let Some(mut nursery) = Nursery::new(test, axes, 8) else { return };
        let parent = nursery.first_vm();
        let pages = wide(LEAF_PAGES) * 2;
        for gfn in (0..pages).map(Gfn) {
            parent.set(gfn, 100 + gfn.0);
        }
        parent.set(Gfn(1030), 7);
        let child = nursery.fork(&parent);
        parent.set(Gfn(5), 1);
        child.set(Gfn(6), 2);
        for gfn in (0..pages).map(Gfn) {
            let old = 100 + gfn.0;
            assert_eq!(parent.get(gfn), if gfn.0 == 5 { 1 } else { old }, "{axes:?} {gfn}");
            assert_eq!(child.get(gfn), if gfn.0 == 6 { 2 } else { old }, "{axes:?} {gfn}");
        }
        assert_eq!((child.get(Gfn(1030)), child.get(Gfn(1031))), (7, 0));
        nursery.check();
        for leaf in nursery.leaves() {
            assert_eq!(child.get(leaf.gfn(511)), parent.get(leaf.gfn(511)));
        }
        nursery.publish_everything(Keep::Own);
        nursery.check();
        for vm in [&parent, &child] {
            let watched: Vec<_> = maps(vm.window()).into_iter().filter(|map| map.is_registered()).collect();
            assert!(watched.is_empty(), "{axes:?}: {watched:?}");
        }
    }
}

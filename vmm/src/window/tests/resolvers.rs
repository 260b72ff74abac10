//! The threads that resolve faults: how many there are.

use std::sync::Arc;
use std::time::Duration;

use super::nursery::{Axes, Nursery};
use crate::window::{OnEnd, OnFailure, Resolvers};

#[test]
fn those_that_are_sent_home_are_joined_and_one_stays() {
    let Some(mut nursery) = Nursery::new("surplus_resolvers", Axes::SMALL, 1) else { return };
    let parent = nursery.first_vm();
    let (ends, ended) = std::sync::mpsc::channel();
    let on_end: OnEnd = Arc::new(move || ends.send(()).expect("the test waits"));
    let on_failure: OnFailure = Arc::new(|error| panic!("{error}"));
    let mut resolvers = Resolvers::start(&parent.space, 3, &on_failure, &on_end).expect("threads");
    resolvers.join_ended();
    assert_eq!(resolvers.count(), 3);
    resolvers.surplus().send_home().expect("they can be told");
    for left in [2, 1] {
        ended.recv_timeout(Duration::from_secs(20)).expect("a thread ends");
        resolvers.join_ended();
        assert!(resolvers.count() <= left, "{} are there", resolvers.count());
    }
    // Sent home once more: there is no surplus any more.
    resolvers.surplus().send_home().expect("nobody is told");
    assert_eq!(resolvers.count(), 1);
}

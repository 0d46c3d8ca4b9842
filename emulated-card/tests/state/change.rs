//! Changing the PIN, and the PUK.

use super::*;

#[test]
fn a_changed_pin_is_the_pin_of_every_later_run() {
    let place = Place::new();
    let claim = place.claim("");
    let store = Store::with(|secret| if secret == b"host" { Ok(()) } else { Err(UnlockError::Wrong) });
    let (data, ..) = place.own_with_puk(&claim, Some(&RIGHT.into()), Some(&PUK.into())).unwrap();
    let login = data.change(&RIGHT.into(), &NEW.into(), &store).unwrap();
    assert_eq!(store.logins(), 1);
    drop(login);
    for data in [&data, &place.own(&claim, None).unwrap().0] {
        assert_wrong(&data.verify(&RIGHT.into(), &store), 2);
        data.verify(&NEW.into(), &store).unwrap();
    }
    // And the PUK is what it was.
    data.unblock(&PUK.into(), &RIGHT.into()).unwrap();
    data.verify(&RIGHT.into(), &store).unwrap();
}

#[test]
fn a_wrong_old_pin_counts_as_in_verify() {
    for case in Case::all() {
        let (data, store) = (&case.data, Case::store());
        assert_wrong(&data.change(&WRONG.into(), &NEW.into(), &store), 2);
        assert_wrong(&data.verify(&WRONG.into(), &store), 1);
        assert_wrong(&data.change(&WRONG.into(), &NEW.into(), &store), 0);
        assert!(matches!(data.change(&RIGHT.into(), &NEW.into(), &store), Err(PinError::Blocked)));
        assert!(matches!(data.verify(&RIGHT.into(), &store), Err(PinError::Blocked)));
        assert_eq!((data.tries_left().unwrap(), data.puk_tries_left().unwrap()), (0, 3));
        assert_eq!(store.compared(), 0);
    }
}

#[test]
fn the_puk_unblocks_and_sets_the_pin_and_logs_nobody_in() {
    for case in Case::all() {
        let (data, store) = (&case.data, Case::store());
        for left in [2, 1, 0] {
            assert_wrong(&data.verify(&WRONG.into(), &store), left);
        }
        assert!(matches!(data.unblock(&WRONG.into(), &NEW.into()), Err(PinError::Wrong { left: 2 })));
        assert_eq!((data.tries_left().unwrap(), data.puk_tries_left().unwrap()), (0, 2));
        data.unblock(&PUK.into(), &NEW.into()).unwrap();
        assert_eq!((data.tries_left().unwrap(), data.puk_tries_left().unwrap()), (3, 3));
        assert_eq!(store.compared(), 0);
        assert_wrong(&data.verify(&RIGHT.into(), &store), 2);
        data.verify(&NEW.into(), &store).unwrap();
    }
}

#[test]
fn the_puk_blocks_for_itself() {
    for case in Case::all() {
        let (data, store) = (&case.data, Case::store());
        let wrong =
            |left| move |error: &PinError| matches!(error, PinError::Wrong { left: now } if *now == left);
        assert!(data.unblock(&WRONG.into(), &NEW.into()).is_err_and(|error| wrong(2)(&error)));
        assert!(data.change_puk(&WRONG.into(), &PUK.into()).is_err_and(|error| wrong(1)(&error)));
        assert!(data.unblock(&RIGHT.into(), &NEW.into()).is_err_and(|error| wrong(0)(&error)));
        assert!(matches!(data.unblock(&PUK.into(), &NEW.into()), Err(PinError::Blocked)));
        assert!(matches!(data.change_puk(&PUK.into(), &WRONG.into()), Err(PinError::Blocked)));
        assert_eq!((data.tries_left().unwrap(), data.puk_tries_left().unwrap()), (3, 0));
        // The PIN works all the same, and gives no try of the PUK back.
        data.verify(&RIGHT.into(), &store).unwrap();
        assert_eq!(data.puk_tries_left().unwrap(), 0);
        // `vscclient unlock`
        assert!(data.reset_tries().unwrap());
        data.unblock(&PUK.into(), &NEW.into()).unwrap();
    }
}

#[test]
fn the_puk_can_be_changed() {
    let new = [0x00, 0xff, 1, 2, 3, 4, 5, 6];
    for case in Case::all() {
        let data = &case.data;
        data.change_puk(&PUK.into(), &new[..].into()).unwrap();
        assert!(matches!(data.unblock(&PUK.into(), &NEW.into()), Err(PinError::Wrong { left: 2 })));
        data.unblock(&new[..].into(), &NEW.into()).unwrap();
    }
}

#[test]
fn an_unfit_new_pin_or_puk_costs_no_try_and_changes_nothing() {
    for case in Case::all() {
        let (data, store) = (&case.data, Case::store());
        for (new, error) in [
            (&b""[..], CardPinError::Length),
            (b"123", CardPinError::Length),
            (b"123456789", CardPinError::Length),
            (b"123456\xff\xff", CardPinError::Byte),
        ] {
            for old in [RIGHT, WRONG] {
                let refused = data.change(&old.into(), &new.into(), &store).err();
                assert!(matches!(refused, Some(PinError::Unfit(e)) if e == error), "{refused:?}");
            }
            for puk in [PUK, WRONG] {
                let refused = data.unblock(&puk.into(), &new.into()).err();
                assert!(matches!(refused, Some(PinError::Unfit(e)) if e == error), "{refused:?}");
            }
        }
        for new in [&b""[..], b"1234567", b"123456789", &[0xff; 8]] {
            let refused = data.change_puk(&WRONG.into(), &new.into()).err();
            assert!(matches!(refused, Some(PinError::Unfit(CardPinError::Puk))), "{refused:?}");
        }
        assert_eq!((data.tries_left().unwrap(), data.puk_tries_left().unwrap()), (3, 3));
        data.verify(&RIGHT.into(), &store).unwrap();
    }
}

#[test]
fn a_store_that_fails_leaves_the_old_pin() {
    let place = Place::new();
    let claim = place.claim("");
    let (data, _) = place.own(&claim, Some(&RIGHT.into())).unwrap();
    let failing = Store::with(|_| Err(UnlockError::NotChecked("token gone".into())));
    assert!(matches!(data.change(&RIGHT.into(), &NEW.into(), &failing), Err(PinError::NotChecked(_))));
    assert_eq!(data.tries_left().unwrap(), 3);
    data.verify(&RIGHT.into(), &Store::with(|_| Ok(()))).unwrap();
}

#[test]
fn only_a_card_with_a_pin_of_its_own_lets_it_be_changed() {
    let place = Place::new();
    let claim = place.claim("");
    let (own, ..) = place.own_with_puk(&claim, Some(&RIGHT.into()), None).unwrap();
    let store = Store::with(|_| Ok(()));
    for data in [&place.data(3), &ReferenceData::in_memory(3), &ReferenceData::any(Secret::default()), &own] {
        let unsupported = |error: PinError| matches!(error, PinError::NotSupported);
        assert!(data.unblock(&PUK.into(), &NEW.into()).is_err_and(unsupported));
        assert!(data.change_puk(&PUK.into(), &NEW.into()).is_err_and(unsupported));
        assert!(data.puk_tries_left().is_err_and(unsupported));
        assert_eq!(data.tries_left().unwrap(), 3);
        if !std::ptr::eq(data, &own) {
            assert!(data.change(&RIGHT.into(), &NEW.into(), &store).is_err_and(unsupported));
        }
    }
    own.change(&RIGHT.into(), &NEW.into(), &store).unwrap();
}

#[test]
fn a_first_puk_is_used_once_and_a_card_without_one_can_get_it_later() {
    let place = Place::new();
    let claim = place.claim("");
    for puk in [&b"1234567"[..], b"123456789", &[0xff; 8]] {
        let refused = place.own_with_puk(&claim, Some(&RIGHT.into()), Some(&puk.into())).unwrap_err();
        assert!(matches!(refused, StateError::CardPin(CardPinError::Puk)), "{refused}");
    }
    assert!(!ReferenceData::card_has_pin(&place.directory, &claim).unwrap());
    let no_pin = place.own_with_puk(&claim, None, Some(&PUK.into())).unwrap_err();
    assert!(matches!(no_pin, StateError::NoPin { .. }));

    let (data, pin, puk) = place.own_with_puk(&claim, Some(&RIGHT.into()), None).unwrap();
    assert_eq!((pin, puk), (Initial::Created, Initial::NotGiven));
    assert_wrong(&data.verify(&WRONG.into(), &Store::new()), 2);
    let (data, pin, puk) = place.own_with_puk(&claim, Some(&NEW.into()), Some(&PUK.into())).unwrap();
    assert_eq!((pin, puk), (Initial::Ignored, Initial::Created));
    assert_eq!(data.tries_left().unwrap(), 2);
    let (data, pin, puk) = place.own_with_puk(&claim, None, Some(&WRONG.into())).unwrap();
    assert_eq!((pin, puk), (Initial::NotGiven, Initial::Ignored));
    data.unblock(&PUK.into(), &NEW.into()).unwrap();
}

#[test]
fn damage_to_a_card_with_a_puk_refuses_everything() {
    let place = Place::new();
    let claim = place.claim("");
    let (data, ..) = place.own_with_puk(&claim, Some(&RIGHT.into()), Some(&PUK.into())).unwrap();
    assert!(data.unblock(&WRONG.into(), &NEW.into()).is_err());
    let (file, store) = (place.state_file(), Store::with(|_| Ok(())));
    let good = fs::read(&file).unwrap();
    drop(claim);
    for at in (0..600).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        bad[SLOT + at] ^= 1 << (at % 8);
        for bad in [&bad[..], &good[..at]] {
            fs::write(&file, bad).unwrap();
            let damaged = |error: PinError| matches!(error, PinError::State(StateError::Damaged { .. }));
            assert!(data.verify(&RIGHT.into(), &store).is_err_and(damaged), "byte {at}");
            assert!(data.change(&RIGHT.into(), &NEW.into(), &store).is_err_and(damaged), "byte {at}");
            assert!(data.unblock(&PUK.into(), &NEW.into()).is_err_and(damaged), "byte {at}");
            assert!(data.change_puk(&PUK.into(), &NEW.into()).is_err_and(damaged), "byte {at}");
            assert!(data.reset_tries().is_err(), "byte {at}");
            assert!(place.directory.claim(DATABASE.as_ref(), &card("")).is_err(), "byte {at}");
            assert_eq!(fs::read(&file).unwrap(), bad, "byte {at}");
        }
    }
    fs::write(&file, good).unwrap();
    assert_eq!((data.tries_left().unwrap(), data.puk_tries_left().unwrap()), (3, 2));
}

#[test]
fn parallel_guesses_of_the_puk_get_exactly_the_tries() {
    let place = Place::new();
    let claim = place.claim("");
    place.own_with_puk(&claim, Some(&RIGHT.into()), Some(&PUK.into())).unwrap();
    let start = Barrier::new(4);
    let left = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for at in 0..4 {
            let (data, _) = place.own(&claim, None).unwrap();
            let (start, left) = (&start, &left);
            scope.spawn(move || {
                start.wait();
                loop {
                    let refused = match at % 2 {
                        0 => data.unblock(&WRONG.into(), &NEW.into()),
                        _ => data.change_puk(&WRONG.into(), &PUK.into()),
                    };
                    match refused {
                        Err(PinError::Wrong { left: now }) => left.lock().unwrap().push(now),
                        Err(PinError::Blocked) => return,
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
    });
    assert_eq!(left.into_inner().unwrap(), [2, 1, 0]);
}

/// The child changes the PIN to the next one, and again, and says which it is; killed at any moment, the PIN is the
/// last one it said or the one after it, and no more than a try is gone.
#[test]
fn killed_while_changing_it_is_the_old_pin_or_the_new() {
    let place = Place::new();
    let claim = place.claim("");
    let (data, ..) = place.own_with_puk(&claim, Some(&numbered(0)), Some(&PUK.into())).unwrap();
    drop(claim);
    let store = Store::with(|_| Ok(()));
    let (mut pin, mut kills) = (0, 0);
    while kills < 15 {
        // Every third child unblocks.
        let what = ["change", "change", "unblock"][kills % 3];
        let (mut child, mut output) = started(in_child(what, &place).env(CHILD_PIN, pin.to_string()));
        for now in kill_in_a_round(&mut child, &mut output) {
            pin += 1;
            assert_eq!(now, format!("pin {pin}"));
        }
        let (tries, puk_tries) = (data.tries_left().unwrap(), data.puk_tries_left().unwrap());
        assert!(tries >= 2 && puk_tries >= 2 && tries + puk_tries >= 5, "{tries} and {puk_tries}");
        if data.verify(&numbered(pin + 1), &store).is_ok() {
            pin += 1;
        } else {
            data.verify(&numbered(pin), &store).unwrap();
        }
        assert_eq!(data.tries_left().unwrap(), 3);
        data.change_puk(&PUK.into(), &PUK.into()).unwrap();
        kills += 1;
    }
}

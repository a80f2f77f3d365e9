//! A pole on a cart that a motor pushes to the left or to the right: the equations of Barto, Sutton and
//! Anderson (1983, "Neuronlike adaptive elements that can solve difficult learning control problems")
//! without friction, with the constants and limits of Gymnasium's `CartPole-v1`.

use rand::{Rng, RngExt};

const GRAVITY: f64 = 9.8;
const CART_MASS: f64 = 1.0;
/// The seconds between two decisions, and the step of Euler's method.
const TAU: f64 = 0.02;
/// The cart must stay this near to the middle of the track, in metres.
const MAX_POSITION: f64 = 2.4;
/// The pole must stay this near to the vertical, in radians.
const MAX_ANGLE: f64 = 12.0 / 360.0 * std::f64::consts::TAU;

/// An episode ends after so many steps, each of which earns 1: it is the highest return.
pub const MAX_STEPS: usize = 500;

/// What differs from one cart to another.
#[derive(Clone, Copy, Debug)]
pub struct Physics {
    /// Half the pole's length, in metres.
    pub half_length: f64,
    /// In kilograms.
    pub pole_mass: f64,
    /// What the motor pushes with when it is told to push to the right, in newtons.
    pub force: f64,
}

impl Physics {
    pub const STANDARD: Self = Self { half_length: 0.5, pole_mass: 0.1, force: 10.0 };

    /// With a longer pole of the same rod, which is as many times heavier.
    pub const fn longer(self, times: f64) -> Self {
        let (half_length, pole_mass) = (self.half_length * times, self.pole_mass * times);
        Self { half_length, pole_mass, ..self }
    }

    /// With a motor that pushes to the left when it is told to push to the right.
    pub const fn reversed(self) -> Self {
        Self { force: -self.force, ..self }
    }

    /// The accelerations of the cart and of the angle under a force on the cart.
    fn accelerations(&self, state: &State, force: f64) -> (f64, f64) {
        let Self { half_length, pole_mass, .. } = *self;
        let (sin, cos) = state.angle.sin_cos();
        let mass = CART_MASS + pole_mass;
        let push = (force + pole_mass * half_length * state.spin.powi(2) * sin) / mass;
        let angle = (GRAVITY * sin - cos * push)
            / (half_length * (4.0 / 3.0 - pole_mass * cos.powi(2) / mass));
        (push - pole_mass * half_length * angle * cos / mass, angle)
    }

    /// The state a moment later, after a push to the right or to the left.
    pub fn step(&self, state: &State, right: bool) -> State {
        let force = if right { self.force } else { -self.force };
        state.after(TAU, self.accelerations(state, force))
    }
}

/// Where the cart and the pole are, and how fast they move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    pub position: f64,
    pub velocity: f64,
    /// The angle from the vertical, to the right.
    pub angle: f64,
    /// How fast the angle grows.
    pub spin: f64,
}

impl State {
    /// The start of an episode: nearly upright, and nearly at rest.
    pub fn start(rng: &mut impl Rng) -> Self {
        let mut draw = || rng.random_range(-0.05..0.05);
        Self { position: draw(), velocity: draw(), angle: draw(), spin: draw() }
    }

    /// Whether the pole has fallen, or the cart has left the track.
    pub fn failed(&self) -> bool {
        self.position.abs() > MAX_POSITION || self.angle.abs() > MAX_ANGLE
    }

    /// One step of Euler's method.
    fn after(&self, seconds: f64, (cart, angle): (f64, f64)) -> Self {
        Self {
            position: self.position + seconds * self.velocity,
            velocity: self.velocity + seconds * cart,
            angle: self.angle + seconds * self.spin,
            spin: self.spin + seconds * angle,
        }
    }
}

#[cfg(test)]
mod tests {
    use nalgebra::{Matrix4, Vector4};
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    const ALL: [Physics; 4] = [
        Physics::STANDARD,
        Physics::STANDARD.reversed(),
        Physics::STANDARD.longer(10.0),
        Physics { half_length: 1.3, pole_mass: 0.7, force: 3.0 },
    ];

    /// Newton's and Euler's laws for the cart and for the pole, with the force in the hinge as unknowns.
    /// The published equations are these, solved.
    fn solved(physics: &Physics, state: &State, force: f64) -> (f64, f64) {
        let (m, l) = (physics.pole_mass, physics.half_length);
        let (sin, cos) = state.angle.sin_cos();
        let inertia = m * l * l / 3.0;
        // The unknowns: the two accelerations, and the hinge's horizontal and vertical force on the pole.
        #[rustfmt::skip]
        let laws = Matrix4::new(
            CART_MASS, 0.0,          1.0,     0.0,
            m,         m * l * cos,  -1.0,    0.0,
            0.0,       -m * l * sin, 0.0,     -1.0,
            0.0,       inertia,      l * cos, -l * sin,
        );
        let centripetal = m * l * state.spin.powi(2);
        let known = Vector4::new(force, centripetal * sin, centripetal * cos - m * GRAVITY, 0.0);
        let unknown = laws.lu().solve(&known).expect("the laws determine the motion");
        (unknown[0], unknown[1])
    }

    fn wild(rng: &mut StdRng) -> State {
        let mut draw = |limit: f64| rng.random_range(-limit..limit);
        State { position: draw(2.4), velocity: draw(3.0), angle: draw(3.0), spin: draw(4.0) }
    }

    #[test]
    fn a_step_follows_from_newtons_laws() {
        let mut rng = StdRng::seed_from_u64(1);
        for (physics, right) in ALL.iter().flat_map(|it| [(it, false), (it, true)]) {
            for _ in 0..100 {
                let state = wild(&mut rng);
                let force = if right { physics.force } else { -physics.force };
                let (cart, angle) = solved(physics, &state, force);
                let next = physics.step(&state, right);
                let expected = [
                    state.position + 0.02 * state.velocity,
                    state.velocity + 0.02 * cart,
                    state.angle + 0.02 * state.spin,
                    state.spin + 0.02 * angle,
                ];
                let found = [next.position, next.velocity, next.angle, next.spin];
                for (found, expected) in found.into_iter().zip(expected) {
                    assert!((found - expected).abs() < 1e-12 * expected.abs().max(1.0));
                }
            }
        }
    }

    #[test]
    fn without_a_motor_energy_is_kept() {
        let energy = |physics: &Physics, state: &State| {
            let (m, l) = (physics.pole_mass, physics.half_length);
            let (sin, cos) = state.angle.sin_cos();
            let across = state.velocity + l * state.spin * cos;
            let up = -l * state.spin * sin;
            0.5 * CART_MASS * state.velocity.powi(2)
                + 0.5 * m * (across.powi(2) + up.powi(2))
                + 0.5 * (m * l * l / 3.0) * state.spin.powi(2)
                + m * GRAVITY * l * cos
        };
        for physics in ALL {
            let start = State { position: 0.0, velocity: 0.3, angle: 0.4, spin: -0.5 };
            let error = |steps: usize| {
                let end = (0..steps).fold(start, |state, _| {
                    state.after(2.0 / steps as f64, physics.accelerations(&state, 0.0))
                });
                assert!((end.angle - start.angle).abs() > 0.1, "{end:?}");
                (energy(&physics, &end) - energy(&physics, &start)).abs()
            };
            // Euler's method has an error of the first order, which vanishes with the step.
            let (coarse, fine) = (error(100_000), error(1_000_000));
            assert!(fine < 1e-3 && (5.0..20.0).contains(&(coarse / fine)), "{coarse} {fine}");
        }
    }

    /// As in Gymnasium.
    #[test]
    fn the_first_push_has_known_results() {
        let still = State { position: 0.0, velocity: 0.0, angle: 0.0, spin: 0.0 };
        let pushed = Physics::STANDARD.step(&still, true);
        assert_eq!((pushed.position, pushed.angle), (0.0, 0.0));
        assert!((pushed.velocity - 0.19512195).abs() < 1e-8);
        assert!((pushed.spin + 0.29268293).abs() < 1e-8);
    }

    #[test]
    fn a_reversed_motor_pushes_the_other_way() {
        let mut rng = StdRng::seed_from_u64(2);
        let state = wild(&mut rng);
        let reversed = Physics::STANDARD.reversed();
        assert_eq!(reversed.step(&state, true), Physics::STANDARD.step(&state, false));
    }

    #[test]
    fn episodes_start_within_the_limits_and_end_beyond_them() {
        let start = State::start(&mut StdRng::seed_from_u64(3));
        assert!(!start.failed());
        assert!(State { position: -2.41, ..start }.failed());
        assert!(State { angle: 0.21, ..start }.failed());
        assert!(!State { angle: -0.209, ..start }.failed());
        // Pushed to one side all the time, the pole falls within 10 steps, as is known of this task.
        let states =
            std::iter::successors(Some(start), |it| Some(Physics::STANDARD.step(it, true)));
        let steps = states.take_while(|state| !state.failed()).count();
        assert!((8..=11).contains(&steps), "{steps}");
    }
}

! Energy and forces of two atoms, by a potential as a library: ./example_fortran model.segnn Si 2.35
program example
  use iso_c_binding
  implicit none
  interface
    function segnn_open(path, error, size) bind(c)
      import
      character(kind=c_char), intent(in) :: path(*)
      character(kind=c_char), intent(out) :: error(*)
      integer(c_size_t), value :: size
      type(c_ptr) :: segnn_open
    end function
    subroutine segnn_close(s) bind(c)
      import
      type(c_ptr), value :: s
    end subroutine
    function segnn_species(s, symbol) bind(c)
      import
      type(c_ptr), value :: s
      character(kind=c_char), intent(in) :: symbol(*)
      integer(c_int) :: segnn_species
    end function
    function segnn_evaluate(s, n, species, first, senders, vectors, energy, energies, forces, virial, virials) bind(c)
      import
      type(c_ptr), value :: s, energies, virials
      integer(c_int64_t), value :: n
      integer(c_int), intent(in) :: species(*)
      integer(c_int64_t), intent(in) :: first(*), senders(*)
      real(c_double), intent(in) :: vectors(3, *)
      real(c_double), intent(out) :: energy, forces(3, *), virial(3, 3)
      integer(c_int) :: segnn_evaluate
    end function
    function segnn_n_cues(s) bind(c)
      import
      type(c_ptr), value :: s
      integer(c_int) :: segnn_n_cues
    end function
  end interface
  character(len=1024) :: path, symbol, distance
  character(kind=c_char) :: error(256)
  type(c_ptr) :: s
  integer(c_int) :: species(2), wrong
  real(c_double) :: d, energy, forces(3, 2), virial(3, 3), vectors(3, 2)
  integer :: i

  if (command_argument_count() /= 3) stop 'usage: example_fortran model.segnn SYMBOL DISTANCE'
  call get_command_argument(1, path)
  call get_command_argument(2, symbol)
  call get_command_argument(3, distance)
  read (distance, *) d
  s = segnn_open(trim(path) // c_null_char, error, int(size(error), c_size_t))
  if (.not. c_associated(s)) then
    print '(256a)', (error(i), i = 1, findloc(error, c_null_char, 1) - 1)
    stop 1
  end if
  if (segnn_n_cues(s) > 0) stop 'this potential is told more of each atom, of which this example knows nothing'
  species = segnn_species(s, trim(symbol) // c_null_char)
  if (species(1) < 0) stop 'the potential does not know this element'
  vectors = 0
  vectors(1, :) = [d, -d]
  wrong = segnn_evaluate(s, 2_c_int64_t, species, [0_c_int64_t, 1_c_int64_t, 2_c_int64_t], [1_c_int64_t, 0_c_int64_t], &
                         vectors, energy, c_null_ptr, forces, virial, c_null_ptr)
  if (wrong == 0) print '(a, f20.10, a, 3f16.10)', 'energy ', energy, '  force ', forces(:, 1)
  call segnn_close(s)
  if (wrong /= 0) stop 1
end program
